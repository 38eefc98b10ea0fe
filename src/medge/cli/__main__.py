"""python -m medge.cli."""

from medge.cli import main

main()
