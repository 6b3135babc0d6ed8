"""`python -m rl_soft RECIPE [--key value ...]`, the form that any YAML works with."""

from rl_soft.cli import main

if __name__ == "__main__":
    main()
