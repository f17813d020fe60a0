r"""Mask R-CNN on MSVMamba micro for COCO, 12 epochs, from an ImageNet checkpoint.

    python -m msvmamba_jax.train --config configs/coco_micro_1x.py --config.data.root=/datasets/coco \
        --config.pretrained=vssm_micro.pth --workdir runs/coco_micro_1x
    python -m msvmamba_jax.evaluate --config configs/coco_micro_1x.py --config.data.root=/datasets/coco \
        --checkpoint runs/coco_micro_1x

The recipe, with every option, is in coco.py. Expected: box / mask AP of 43.8 / 39.9 is what the original's authors
report for this recipe (arXiv:2405.14174); this project has not trained it yet, so neither our score nor the cost in
device hours is measured.
"""

from ml_collections import ConfigDict

from msvmamba_jax.configs.coco import recipe


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return recipe("msvmamba_micro", epochs=12, drops=(8, 11), multi_scale=False)
