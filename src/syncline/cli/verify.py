"""`syncline verify FOLDER --engine-url URL`: whether a running engine holds a checkpoint's weights, bit for bit."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a checkpoint: safetensors files and config.json")
    parser.add_argument("--engine-url", required=True)
    parser.add_argument("--timeout-seconds", type=float, default=120.0, help="for the engine's answer")


def run(args: argparse.Namespace) -> int:
    from syncline.bridges.verify import faults_of
    from syncline.engines.client import EngineController
    from syncline.errors import SyncError

    engine = EngineController(args.engine_url, timeout_seconds=args.timeout_seconds)
    try:
        receipt, served = engine.measure()
    finally:
        engine.close()
    if faults := faults_of(args.folder, served):
        raise SyncError(f"{engine.name} does not hold the weights of {args.folder}:\n" + "\n".join(faults))
    version = f"policy version {receipt.policy_version}" if receipt.policy_version >= 0 else "no policy version"
    print(f"{engine.name} holds the weights of {args.folder}: {len(served)} parameters, {version}")
    print(f"digest {receipt.digest}")
    return 0
