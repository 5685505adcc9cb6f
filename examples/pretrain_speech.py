"""Pretrain a speech encoder by TERA's alterations, probe it, and draw the spectrograms that it restores.

    accelerate launch examples/pretrain_speech.py            # ten digits spoken by eSpeak NG's synthetic voices
    accelerate launch examples/pretrain_speech.py --data FOLDER_OF_WAV_FLAC_OGG_OR_MP3
    accelerate launch examples/pretrain_speech.py --config examples/recipes/tera_base.yaml --data PATH_TO_LIBRISPEECH

The flags are those of ``mmssl pretrain``; ``--help`` lists them.
"""

from pathlib import Path

from mmssl.cli import clear_errors, parse_pretrain
from mmssl.evaluation import closing_words
from mmssl.training import load_objective, pretrain


def main() -> None:
    arguments = parse_pretrain(recipe=Path(__file__).parent / "recipes" / "tera_spoken_digits.yaml")
    run = pretrain(**arguments)
    closing_words(run, load_objective(run), arguments["data"])


if __name__ == "__main__":
    with clear_errors(Path(__file__).name):
        main()
