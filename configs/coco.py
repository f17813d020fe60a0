"""The COCO recipe of the original (Mask R-CNN), which the coco_*.py beside this file share.

12 epochs ("1x") or 36 ("3x", with images of several sizes), 16 images at a time over all devices. `root` is a folder
with train2017/, val2017/ and annotations/.
"""

from ml_collections import ConfigDict


def recipe(model: str, *, epochs: int, drops: tuple[int, int], multi_scale: bool) -> ConfigDict:
    """The configuration for a variant of the backbone and a schedule."""
    return ConfigDict(
        {
            "task": "detection",
            "seed": 0,
            "data": {
                "source": "coco",
                "root": "",  # the folder with train2017/, val2017/ and annotations/
                "train_images": "train2017",
                "train_annotations": "annotations/instances_train2017.json",
                "evaluation_images": "val2017",
                "evaluation_annotations": "annotations/instances_val2017.json",
                "name": "",  # for the source "coco_tfds": empty for COCO, as scripts/prepare_coco.py calls it
                "data_dir": "",  # likewise: where it was prepared
                "workers": 8,  # processes that load and augment; 0: threads of the training process
                "scale": (1333, 800),  # bounds of the long and the short side, pixels
                "multi_scale": multi_scale,  # train on short sides of 480 to 800 pixels, some after a random crop
                "flip": 0.5,
                "bucket": 0,  # evaluate padded to multiples of so many pixels, for few shapes; 0: exact
            },
            "model": {"name": model, "channels": 256, "hidden": 1024, "drop_path": 0.2},
            "regions": {
                "proposals": (2000, 1000),  # of the RPN in training: of each level before, and of all after suppression
                "evaluation_proposals": (1000, 1000),
                "anchor_samples": 256,  # of an image, that the RPN learns from, half of them positive
                "region_samples": 512,  # of an image, that the heads learn from, a quarter of them positive
            },
            "dtype": "bfloat16",  # of the computation; parameters and the scan's state are float32
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint whose backbone to start from: vssm_*.pth, a folder, a run's workdir
            "freeze_backbone": False,  # train all but the backbone
            "batch_size": 16,  # over all devices
            "evaluation_per_device": 1,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": f"{epochs} epochs",  # or "1000 steps"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "steps",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 1e-4,
                "warmup_start": 1e-7,
                "minimum": 0.0,
                "drops": tuple(f"{epoch} epochs" for epoch in drops),  # when the rate falls to a tenth; for "steps"
                "batch_size": 16,
                "warmup": "1000 steps",
                "weight_decay": 0.05,
                "no_decay": "norms",  # what decays not: the backbone's norms; or "vectors", with biases
                "layer_decay": 1.0,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 0.0,  # 0: no clipping
            },
            "ema_decay": 0.0,  # of averaged weights, for each step; 0: none
            "log_every": "50 steps",
            "evaluate_every": "1 epoch",
            "save_every": "2000 steps",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
