"""Nodes of a Ray cluster on this machine: ``python ray_nodes.py CPUS:GPUS...``, the head first.

The GPUs are only said to be there. Prints a line of JSON with its address and the process id of each node's raylet. It
ends, and all of Ray with it, when its standard input is closed.
"""

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster()
    nodes = []
    for cpus, gpus in (text.split(":") for text in sys.argv[1:]):
        options = {"include_dashboard": False, "no_monitor": True} if not nodes else {}
        nodes.append(
            cluster.add_node(num_cpus=int(cpus), num_gpus=int(gpus), object_store_memory=80 * 2**20, **options)
        )
    cluster.wait_for_nodes()
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
