"""`python -m job` is the same as `s4gan`."""

from job.cli import main

if __name__ == "__main__":
    main()
