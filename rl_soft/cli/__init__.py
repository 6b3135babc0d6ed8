"""The command line. `main` is what a recipe calls when Python is given it, and the entry point `rl-soft`."""


def main(argv: list[str] | str | None = None) -> None:
    from rl_soft.rollouts.vllm import cpu

    cpu.prepare()  # before anything imports Triton
    from rl_soft.cli.app import main as run

    run(argv)
