r"""Fine-tuning of a pretrained model on your own images, in folders: the recipe to start from.

    python -m msvmamba_jax.train --config configs/finetune.py --config.data.root=/datasets/flowers \
        --config.pretrained=vssm_nano.pth --workdir runs/flowers
    python -m msvmamba_jax.predict runs/flowers photo.jpg

The folder holds train/ and val/ with a folder of images for each class. `pretrained` is a released PyTorch file, a
checkpoint folder or the workdir of another run. Its backbone is loaded, and its head where the classes are the same;
the line printed at the start says what was. What to set:

- `--config.model.name`: the checkpoint's model, where it is not nano.
- `--config.data.size`, `--config.data.resize`: another image size; the weights fit every size.
- `--config.freeze_backbone=true --config.model.drop_path=0.0 --config.optimizer.learning_rate=1e-3`: the head alone.
  There is no backward pass through the backbone, so a step takes less time and memory; for a first look, or for very
  few images. To go on with the whole model, start another workdir with `pretrained` set to this one.
- `--config.dtype=bfloat16` on GPUs; `--config.batch_size`: the learning rate follows.
- `--config.duration="50 epochs"`: more for a few hundred images, fewer for many thousands.

The values are the usual ones for fine-tuning such models; they have not been tuned, and no score has been measured.
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
                "root": "",  # the folder with train/ and val/
                "name": "",  # for the source "tfds": the data set's name, such as "imagenet2012"
                "data_dir": "",  # likewise: where it was prepared; empty: where TensorFlow Datasets looks
                "workers": 4,  # processes that load and augment; 0: threads of the training process
                "size": 224,
                "resize": 256,  # of the short side, for evaluation
                "interpolation": "bicubic",
                "randaugment": "rand-m5-mstd0.5-inc1",
                "scale": (0.3, 1.0),  # area of the random crop
                "ratio": (3 / 4, 4 / 3),  # its width over its height
                "flip": 0.5,  # 0 where left and right matter
            },
            "model": {"name": "msvmamba_nano", "drop_path": 0.1},
            "dtype": "float32",  # of the computation; "bfloat16" on GPUs
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint to start from: a folder, a run's workdir, or a released file
            "freeze_backbone": False,  # train the head alone
            "batch_size": 64,  # over all devices
            "evaluation_per_device": 0,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": "30 epochs",  # or "1000 steps"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "cosine",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 2e-4,  # of the head
                "warmup_start": 2e-7,
                "minimum": 2e-6,
                "drops": (),  # when the rate falls to a tenth, such as ("8 epochs", "11 epochs"); for "steps"
                "batch_size": 64,
                "warmup": "10 %",  # of the run; or epochs, or steps
                "weight_decay": 0.05,
                "no_decay": "vectors",  # what decays not: one-dimensional tensors and biases; or "norms"
                "layer_decay": 0.8,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 5.0,
            },
            "label_smoothing": 0.1,
            "erase_probability": 0.0,  # of random erasing, for each image
            "mix": {  # mixup and CutMix: alpha of the weight's Beta distribution, 0: none
                "mixup": 0.0,
                "cutmix": 0.0,
                "switch_probability": 0.5,  # of CutMix where both are on
                "probability": 1.0,  # that a batch is mixed
            },
            "ema_decay": 0.99,  # of the averaged weights, for each step
            "log_every": "10 steps",
            "evaluate_every": "1 epoch",
            "save_every": "1 epoch",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
