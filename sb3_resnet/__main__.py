"""``python -m sb3_resnet`` is the ``sb3-resnet`` command."""

from sb3_resnet.cli import main

if __name__ == "__main__":
    main()
