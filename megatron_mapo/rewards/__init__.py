"""Verifiers, one file each, and the processes that run them.

``registry.get_verifier`` finds a verifier, ``pool.RewardPool`` runs it. Nothing is imported here: a verifier
process must start without torch and without the rest of the package.
"""
