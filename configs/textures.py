"""Textures: a slim msvmamba_nano from scratch on made-up images of the kind of ImageNet, with its augmentation.

    python scripts/make_texture_dataset.py datasets/textures
    python -m msvmamba_jax.train --config configs/textures.py --workdir runs/textures

Twelve classes that colour does not tell apart, 3,600 training and 600 evaluation images, seen at 64 x 64 pixels. The
whole way of an ImageNet run in small: JPEG files, random crops, flips, RandAugment, random erasing, mixup and CutMix,
averaged weights. Where the images lie elsewhere: --config.data.root=FOLDER.

On two cores of a server CPU 40 epochs took 20 minutes and ended at 91.3 % (averaged weights) and 92.0 % (raw) top-1;
chance is 8.3 %.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return ConfigDict(
        {
            "task": "classification",
            "seed": 0,
            "data": {
                "source": "folder",
                "root": "datasets/textures",
                "size": 64,  # side of the network's input, pixels
                "resize": 73,  # of the short side before the crop in evaluation, as 256 is to 224
                "scale": (0.3, 1.0),  # area of the random crop; smaller ones do not show what the texture is
                "workers": 0,  # processes that load and augment; 0: threads of the training process
            },
            # name: a variant; the other keys replace the variant's own values
            "model": {"name": "msvmamba_nano", "width": 32, "depths": (1, 1, 3, 1), "drop_path": 0.05},
            "dtype": "float32",  # of the computation; "bfloat16" on GPUs
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint to start from: a folder, a run's workdir, or a released file
            "freeze_backbone": False,  # train the head alone
            "batch_size": 32,  # over all devices
            "evaluation_per_device": 0,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": "40 epochs",  # or "1000 steps"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "cosine",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 2e-3,
                "warmup_start": 1e-5,
                "minimum": 1e-5,
                "drops": (),  # when the rate falls to a tenth, such as ("8 epochs", "11 epochs"); for "steps"
                "batch_size": 64,
                "warmup": "10 %",  # of the run; or epochs, or steps
                "weight_decay": 0.05,
                "no_decay": "vectors",  # what decays not: one-dimensional tensors and biases; or "norms"
                "layer_decay": 1.0,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 5.0,
            },
            "label_smoothing": 0.1,
            "erase_probability": 0.25,  # of random erasing, for each image
            "mix": {  # mixup and CutMix: alpha of the weight's Beta distribution, 0: none
                "mixup": 0.2,
                "cutmix": 1.0,
                "switch_probability": 0.5,  # of CutMix where both are on
                "probability": 0.25,  # that a batch is mixed
            },
            "ema_decay": 0.998,  # of the averaged weights, for each step
            "log_every": "56 steps",
            "evaluate_every": "5 epochs",
            "save_every": "5 epochs",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
