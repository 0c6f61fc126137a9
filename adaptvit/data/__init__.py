"""Images to look at, to train and to evaluate on.

images   one picture, decoded
folders  which files of a folder are images
sets     data sets: folders of classes, whatever else timm reads, scikit-learn's digits
"""

from adaptvit.data.folders import IMAGE_SUFFIXES, FolderImages, find_images
from adaptvit.data.images import NOT_FINITE, Unreadable, in_channels, open_image, read_image
from adaptvit.data.sets import (
    HELD_OUT,
    Batch,
    Data,
    DataConfig,
    Images,
    Samples,
    class_names,
    collate,
    digits,
    filled,
    open_data,
    open_split,
)

__all__ = [
    "HELD_OUT",
    "IMAGE_SUFFIXES",
    "NOT_FINITE",
    "Batch",
    "Data",
    "DataConfig",
    "FolderImages",
    "Images",
    "Samples",
    "Unreadable",
    "class_names",
    "collate",
    "digits",
    "filled",
    "find_images",
    "in_channels",
    "open_data",
    "open_image",
    "open_split",
    "read_image",
]
