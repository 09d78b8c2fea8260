"""Entry point: `python main.py COMMAND ...`; `python main.py --help` lists the commands."""

from agri_moe.cli import main

if __name__ == "__main__":
    main()
