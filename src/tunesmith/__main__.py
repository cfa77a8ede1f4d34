"""`python -m tunesmith`, which torchrun and accelerate launch need."""

from tunesmith.cli import main

main()
