"""``python -m modelwright`` is ``mw``; launchers that start a module, such as torchrun, take this one."""

from modelwright.cli.main import run

if __name__ == "__main__":
    run()
