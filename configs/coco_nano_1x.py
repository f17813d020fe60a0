r"""Mask R-CNN on MSVMamba nano for COCO, 12 epochs, from an ImageNet checkpoint.

    python -m msvmamba_jax.train --config configs/coco_nano_1x.py --config.data.root=/datasets/coco \
        --config.pretrained=vssm_nano.pth --workdir runs/coco_nano_1x
    python -m msvmamba_jax.evaluate --config configs/coco_nano_1x.py --config.data.root=/datasets/coco \
        --checkpoint runs/coco_nano_1x

The recipe, with every option, is in coco.py. Expected: the original's authors report no score for nano; this project
has not trained it yet, so neither our score nor the cost in device hours is measured.
"""

from ml_collections import ConfigDict

from msvmamba_jax.configs.coco import recipe


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return recipe("msvmamba_nano", epochs=12, drops=(8, 11), multi_scale=False)
