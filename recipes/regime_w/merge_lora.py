"""Phase 2, first step: the SFT adapter merged into its base, so that any engine can load the model.

    python recipes/regime_w/merge_lora.py --base_model GAIR/Abel-7B-002 --lora_path checkpoints/abel_sft_lora \\
        --output_path checkpoints/abel_sft_merged

Unlike the original's, the merge is proved: the folder appears only if it says what base and adapter said together.
"""

import argparse
import sys
from pathlib import Path

from syncline.errors import SynclineError
from syncline.offline.merge import merge

LINE = "=" * 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="GAIR/Abel-7B-002")
    parser.add_argument("--lora_path", type=Path, required=True)
    parser.add_argument("--output_path", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    print(f"{LINE}\nLoRA Merge for vLLM Optimization\n{LINE}\n\nConfiguration:")
    print(f"  Base model: {args.base_model}\n  LoRA adapter: {args.lora_path}\n  Output path: {args.output_path}\n")
    if args.output_path.exists():
        print(f"--output_path: {args.output_path} is there already; name another folder", file=sys.stderr)
        return 2
    print(f"Loading base model in {'bf16' if args.dtype == 'bfloat16' else 'fp32'}...")
    print(f"Loading LoRA adapter from {args.lora_path}...\nMerging LoRA weights into base model...")
    print(f"Loading tokenizer...\nSaving merged model to {args.output_path}...", flush=True)
    try:
        found = merge(args.base_model, args.lora_path, args.output_path, dtype=args.dtype)
    except SynclineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Mean |Δ logprob| {found.mean_abs_diff:.2e} of {found.adapter_effect:.2e}, digest {found.digest}")
    print(f"\n{LINE}\nLoRA merge complete!\nMerged model saved to: {args.output_path}\n{LINE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
