"""`python -m launch`: the command `stillhouse`, where its script is not on the path."""

from launch.cli import main

if __name__ == "__main__":
    main()
