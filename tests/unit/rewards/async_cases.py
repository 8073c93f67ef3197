"""Asynchronous verifiers, with options, that behave and misbehave; found by import path, run in real processes."""

import asyncio
import os
import time

running = 0
most = 0


async def together(response, answer, metadata):
    """How many are at work at the same time, at most."""
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.2)
    running -= 1
    return float(most)


async def meet(response, answer, metadata, *, others):
    """Right once ``others`` have come: it never is if they are worked on one after another."""
    global running
    running += 1
    while running < others:
        await asyncio.sleep(0.01)
    return True


async def obey(response, answer, metadata):
    """Do what the response says; otherwise compare."""
    if response == "raise":
        raise ValueError("bad response")
    if response == "raise TimeoutError":
        raise TimeoutError("of its own")
    if response == "cancel":
        asyncio.current_task().cancel()
    if response == "wait":
        await asyncio.sleep(1000)
    if response == "block the loop":
        time.sleep(1000)
    if response == "die":
        os._exit(7)
    if response == "eat":
        return len(bytearray(4 << 30)) > 0
    if response == "none":
        return None
    await asyncio.sleep(0.05)
    return response == answer


async def extract(response):
    await asyncio.sleep(0)
    return response.upper() or None


class Callable:
    async def __call__(self, response, answer, metadata):
        await asyncio.sleep(0)
        return response == answer


instance = Callable()


def of_prompt(response, answer, metadata, prompt, *, factor=1.0):
    return factor * len(prompt)


def free(response, answer, metadata, **options):
    return float(sum(options.values()))


def check_options(**options):
    if options.get("factor") == 0:
        raise ValueError("factor must not be 0")
