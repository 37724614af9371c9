"""Pictures and masks on disk → arrays, the same everywhere: in training, benchmarks and probes."""
import io

import numpy as np
from PIL import Image, PngImagePlugin

from pivot import packs
from pivot.distributed import print0
from pivot.records import PICTURES, BadRecord

MAX_PIXELS = 50_000_000     # a larger image is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None     # our own bound, above, is checked first
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26   # bytes of a profile or text; some have over Pillow's 1 MB
TURNED = {       # EXIF's orientation → what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
DARK = 16                   # of 255: values of 12 bits in a file of 16 reach no further
BITS, PHOTOMETRIC, MAXIMUM, S_MAXIMUM = 258, 262, 281, 341      # tags of a TIFF
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")         # not LAB, whose A is a colour
SIDEWAYS = [TURNED[orientation] for orientation in (5, 6, 7, 8)]     # these swap width and height


def planes(image, size):
    """RGB → uint8 (3, size, size), squashed bicubically; None: as it is; two sizes: both, flat."""
    if isinstance(size, tuple):                          # one model of two encoders
        return np.concatenate([planes(image, s).ravel() for s in size])
    image = image.resize((size, size), Image.Resampling.BICUBIC) if size else image
    return np.asarray(image).transpose(2, 0, 1).copy()


def turn_of(image):
    """How EXIF asks for an open picture to be turned; None where it asks for nothing. Broken EXIF,
    which is published, spoils no picture (ImageOps.exif_transpose would write it back)."""
    try:
        return TURNED.get(image.getexif().get(0x0112))
    except Exception:
        return None


def is_picture(entry):
    """Is an entry of a folder a picture, by the end of its name, or, where that says nothing, by
    its first bytes? Hidden files (.DS_Store, ._x.jpg) are none."""
    if entry.name.startswith("."):
        return False
    if entry.name.lower().endswith(PICTURES):
        return True
    with packs.open_file(entry.path) as file:
        head = file.read(12)
    return head.startswith(FIRST_BYTES) or head[4:] == b"ftypavif" or head[8:] == b"WEBP" or \
        (head[:2] == b"BM" and head[6:10] == bytes(4))


def pictures_in(folders):
    """{folder: the paths of its pictures, in the order of names}; prints once how many files are
    none and were left out. raises SystemExit, naming it, at a folder among them."""
    found, others = {}, []
    for folder in folders:
        found[folder] = []
        for entry in packs.scandir(folder):
            if entry.is_file():
                (found[folder] if is_picture(entry) else others).append(entry.path)
            elif entry.is_dir() and not entry.name.startswith("."):
                raise SystemExit(f"error: {entry.path} is a folder among pictures; they are read "
                                 f"from {folder} itself, so move it elsewhere")
            elif not entry.is_dir():
                raise SystemExit(f"error: {entry.path} is no file; is it a link to nothing?")
        found[folder].sort()
    if others:
        print0(f"  {len(others)} files are no pictures and are left out: {min(others)}"
               + (" …" if len(others) > 1 else ""))
    return found


def over_8_bits(image):
    """Does the file hold 16 bits a value? Asked before it is decoded: of colours Pillow keeps 8."""
    def of_16(codec, extents, offset, how):
        most = how[-1] if codec.startswith("ppm") else None         # these say it as a number
        return ";16" in str(how) or (isinstance(most, int) and most > 255)
    return any(of_16(*tile) for tile in image.tile)


def white_of(image, deep, most):
    """The value that is white in a decoded picture of one band, whole numbers of over 8 bits or
    fractions; None where that is not certain. most: the largest value there is."""
    if image.mode == "F":
        return next((white for white in (1, 255) if most <= white), None)
    tags = getattr(image, "tag_v2", {})                 # a TIFF's
    said = [2 ** tags.get(BITS, (16,))[0] - 1, *tags.get(MAXIMUM, ()), *tags.get(S_MAXIMUM, ())]
    for white in (255, 1023, 4095, 16383):              # another maximum is this picture's alone
        if white in said and most <= white:
            return white
    if not deep and most <= 255:                        # 32 bits, of which 8 are used
        return 255
    return 65535 if most <= 65535 else None


def eight_bits(image, deep, name):
    """A decoded picture of one band, whole numbers of over 8 bits or fractions → 8 bits, (H, W).
    Never black in silence: raises BadRecord where it is not certain which value is white."""
    values = np.asarray(image)
    least, most = values.min(), values.max()            # NaN, if there is one
    white = white_of(image, deep, most) if np.isfinite([least, most]).all() else None
    if white is None or least < 0:
        raise BadRecord(f"{name} holds values from {least:g} to {most:g}, and which of them is "
                        f"white is not known; save it with 8 bits")
    if image.mode == "F":
        shown = np.rint(values * (255 / white))
    else:
        shown = values.astype(np.uint32) * 255 // white
    if 0 < most and shown.max() <= DARK:
        raise BadRecord(f"{name} would be nearly black: its largest value is {most:g}, and white "
                        f"may be {white}; save it with 8 bits")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:      # white is zero
        shown = 255 - shown
    return shown.astype(np.uint8)


def refuse_dark(image, name):
    """A file of 16 bits a colour, of which Pillow keeps the upper 8: raises BadRecord where those
    are next to nothing, as in a file that uses 12, or nothing, as in one that uses 8."""
    colours = image.getbands()[:-1] if image.mode in TRANSPARENT else image.getbands()
    most = max(image.getchannel(band).getextrema()[1] for band in colours)
    if most <= DARK:
        raise BadRecord(f"{name} would be nearly black: it has 16 bits a colour, and none reaches "
                        f"over {most} of 255; save it with 8 bits")


def load_image(source, size, where):
    """A path (of a file, or into a pack) or bytes → uint8 pixels as `planes` gives them; raises
    BadRecord.
    EXIF rotation is applied, over 8 bits scaled to 8, transparency laid on white, the first frame
    of an animation taken: what a person sees. HF's processors apply the same bicubic squash.
    """
    name = f"{where}: " + ("embedded image" if isinstance(source, bytes) else f"image {source}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else
                        packs.source(source)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRecord(f"{where}: image of {image.width} × {image.height} pixels, over "
                                f"the bound of {MAX_PIXELS // 10 ** 6} million")
            deep = over_8_bits(image)
            image.load()                                         # broken pixels raise here
            turn = turn_of(image)
            if image.mode[0] in "IF":
                image = Image.fromarray(eight_bits(image, deep, name))
            elif deep:
                refuse_dark(image, name)
            image = image if turn is None else image.transpose(turn)
            if image.mode in TRANSPARENT or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return planes(image.convert("RGB"), size)
    except BadRecord:
        raise
    except Exception as e:   # Pillow's decoders raise nearly anything on broken files
        raise BadRecord(f"{name} cannot be read ({type(e).__name__}: {e})")


def read_mask(mask, image, where):
    """The labels of a picture's mask, as load_image shows the picture: (H, W), or (H, W, C) where
    the mask is in colours. raises BadRecord.

    mask, image: paths. Where EXIF turns the picture, its mask is turned with it: masks are drawn on
    the pixels as stored, or on the upright picture, which then shows in the mask's own size. (Of a
    square, and of a picture that EXIF turns by 180° or mirrors, it does not: then the pixels as
    stored are meant.)
    """
    try:
        with Image.open(packs.source(image)) as picture:
            stored, turn = picture.size, turn_of(picture)
    except Exception as e:
        raise BadRecord(f"{where}: image {image} cannot be read ({type(e).__name__}: {e})")
    upright = stored[::-1] if turn in SIDEWAYS else stored
    try:
        with Image.open(mask) as file:               # its size is known before it is decoded
            size = file.size
            if size == stored:
                labels = np.asarray(file if turn is None else file.transpose(turn))
            elif size == upright:
                labels = np.asarray(file)
            else:
                labels = None
    except Exception as e:
        raise BadRecord(f"{where}: mask {mask} cannot be read ({type(e).__name__}: {e})")
    if labels is None:
        raise BadRecord(f"{where}: mask {mask} has {size[0]} × {size[1]} pixels, its image "
                        f"{upright[0]} × {upright[1]}")
    return labels
