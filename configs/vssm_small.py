r"""VMamba small, the plain baseline (96 channels, blocks 2-2-27-2) on ImageNet-1k, from scratch.

    python -m msvmamba_jax.train --config configs/vssm_small.py \
        --config.data.root=/datasets/imagenet --workdir runs/vssm_small

The folder holds train/ and val/ with a folder for each class. The recipe, with every option, is in imagenet.py.
Expected: the scores of the first version of arXiv:2401.10166, whose stochastic depth this is; this project has not
trained it yet, so neither our score nor the cost in device hours is measured.
"""

from ml_collections import ConfigDict

from msvmamba_jax.configs.imagenet import recipe


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return recipe("vssm_small", drop_path=0.3)
