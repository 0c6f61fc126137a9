"""Images to look at, to train and to evaluate on.

images   one picture, decoded
preparation  how images become what a model takes, as its record says
tars     what is in a tar
classes  names of classes
folders  which files of a folder or a tar are images, and of which class
shards   samples in webdataset's tars
libraries  data sets of the Hub and of torchvision
sets     data sets: all of these, and scikit-learn's digits
masks    images whose every pixel has a class
video    clips: of video files, folders of frames, strips
"""

from adaptvit.data.classes import read_class_map, read_names
from adaptvit.data.folders import (
    IMAGE_SUFFIXES,
    ClassFolders,
    FolderImages,
    LeftOut,
    Listing,
    find_images,
    list_folder,
    list_images,
)
from adaptvit.data.images import (
    Unreadable,
    decode_image,
    first_of,
    in_channels,
    not_finite,
    open_image,
    read_image,
)
from adaptvit.data.masks import Masks, MasksConfig, open_masks
from adaptvit.data.preparation import Renormalise, pixels, preparation, preparation_of_name
from adaptvit.data.sets import (
    HELD_OUT,
    IGNORED,
    Batch,
    Data,
    DataConfig,
    Images,
    Samples,
    check_sources,
    class_names,
    collate,
    filled,
    open_data,
    open_digits,
    open_pictures,
    open_split,
    pan,
    photographs,
    spread_over,
)
from adaptvit.data.video import PERHAPS_STRIPS, ClipFolders, Clips, check_no_strip, may_have_clips, read_clip

__all__ = [
    "HELD_OUT",
    "IGNORED",
    "IMAGE_SUFFIXES",
    "PERHAPS_STRIPS",
    "Batch",
    "ClassFolders",
    "ClipFolders",
    "Clips",
    "Data",
    "DataConfig",
    "FolderImages",
    "Images",
    "LeftOut",
    "Listing",
    "Masks",
    "MasksConfig",
    "Renormalise",
    "Samples",
    "Unreadable",
    "check_no_strip",
    "check_sources",
    "class_names",
    "collate",
    "decode_image",
    "filled",
    "find_images",
    "first_of",
    "in_channels",
    "list_folder",
    "list_images",
    "may_have_clips",
    "not_finite",
    "open_data",
    "open_digits",
    "open_image",
    "open_masks",
    "open_pictures",
    "open_split",
    "pan",
    "photographs",
    "pixels",
    "preparation",
    "preparation_of_name",
    "read_class_map",
    "read_clip",
    "read_image",
    "read_names",
    "spread_over",
]
