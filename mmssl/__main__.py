"""``python -m mmssl``, and ``accelerate launch -m mmssl pretrain ...`` for several processes."""

from mmssl.cli import main

if __name__ == "__main__":
    main()
