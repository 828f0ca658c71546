"""`python -m sglang_lora_moe.launch_server --model-path DIR ...`: read flags, start engine and server, serve until stopped."""

import sys

from sglang_lora_moe.config import parse_config


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 after a clean stop, 1 when the engine died, 2 when the server cannot start, 130 when stopped while starting."""
    config = parse_config(argv)  # --help and wrong flags end here, before anything heavy is imported

    try:
        from sglang_lora_moe.server.serve import serve

        return serve(config)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
