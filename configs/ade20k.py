"""The ADE20K recipe of the original (UperNet on 512 x 512 crops), which the ade20k_*.py beside this file share.

160,000 steps of 16 crops over all devices. `root` is the folder ADEChallengeData2016 with images/ and annotations/.
"""

from ml_collections import ConfigDict


def recipe(model: str, *, drop_path: float) -> ConfigDict:
    """The configuration for a variant of the backbone and its highest rate of stochastic depth."""
    return ConfigDict(
        {
            "task": "segmentation",
            "seed": 0,
            "data": {
                "source": "segmentation_folder",
                "root": "",  # the folder with images/ and annotations/
                "reduce_zero_label": "auto",  # whether 0 is no class; "auto": where the classes are ADE20K's
                "name": "",  # for the source "segmentation_tfds"; empty: as scripts/prepare_ade20k.py calls ADE20K
                "data_dir": "",  # likewise: where it was prepared
                "workers": 8,  # processes that load and augment; 0: threads of the training process
                "scale": (2048, 512),  # bounds of the long and the short side, pixels
                "crop": 512,  # side of the network's input in training, pixels
                "factor": (0.5, 2.0),  # of the scale, for training
                "max_class_part": 0.75,  # of a crop's pixels that one class may have
                "flip": 0.5,
                "distort": True,  # change brightness, contrast, saturation and hue
                "tta": False,  # evaluate with six sizes, each with its mirror image
                "bucket": 0,  # evaluate at multiples of so many pixels, for few shapes; 0: exact
            },
            "model": {"name": model, "channels": 512, "auxiliary_channels": 256, "drop_path": drop_path},
            "dtype": "bfloat16",  # of the computation; parameters and the scan's state are float32
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint whose backbone to start from: vssm_*.pth, a folder, a run's workdir
            "freeze_backbone": False,  # train the head alone
            "batch_size": 16,  # over all devices
            "evaluation_per_device": 1,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": "160000 steps",  # or "100 epochs"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "linear",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 6e-5,
                "warmup_start": 6e-11,
                "minimum": 0.0,
                "drops": (),  # when the rate falls to a tenth, such as ("8 epochs", "11 epochs"); for "steps"
                "batch_size": 16,
                "warmup": "1500 steps",
                "weight_decay": 0.01,
                "no_decay": "norms",  # what decays not: the backbone's norms; or "vectors", with biases
                "layer_decay": 1.0,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 0.0,  # 0: no clipping
            },
            "ema_decay": 0.0,  # of averaged weights, for each step; 0: none
            "log_every": "50 steps",
            "evaluate_every": "16000 steps",
            "save_every": "2000 steps",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
