"""`python -m sglang_lora_moe` and the console script `sglang-lora-moe`: the server."""

import sys

from sglang_lora_moe.launch_server import main

if __name__ == "__main__":
    sys.exit(main())
