"""`python -m sglang_lora_moe` and the console script `sglang-lora-moe`: the server."""

from __future__ import annotations

import sys

from sglang_lora_moe.launch_server import main

if __name__ == "__main__":
    sys.exit(main())
