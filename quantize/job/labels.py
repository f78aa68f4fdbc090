"""Whether the labels of the images that a net is measured on can be the net's classes."""

from __future__ import annotations

from quantize.caffenet import NetParameter
from quantize.data.feed import Feed
from quantize.data.files import FolderLabels
from quantize.data.loader import Images
from quantize.job.prototxts import image_scores
from quantize.progress import SILENT, Progress


def with_labels_that_fit(feed: Feed, net: NetParameter, progress: Progress = SILENT) -> Feed:
    """The feed; without its labels where these are subfolders that cannot be the net's classes.

    What the subfolders were taken for is noted.
    """
    found = folders_as_classes(feed, net)
    if found is None:
        return feed
    text, fit = found
    progress.note(text)
    return feed if fit else feed.unlabeled()


def folders_as_classes(feed: Feed, net: NetParameter) -> tuple[str, bool] | None:
    """What the subfolders of images were taken for, and whether they can be the net's classes.

    None where the images lie in no subfolders.
    """
    for images in feed.inputs.values():
        if isinstance(images, Images) and images.source.folders is not None:
            folders = images.source.folders
            fault = _fault(folders, image_scores(net, feed.shapes).classes)
            return f"{images.source.path}: {folders.text}{f'; but {fault}' if fault else ''}", fault is None
    return None


def _fault(folders: FolderLabels, known: int) -> str | None:
    """Why folders taken as classes are not those of a net with so many (0: not known); None: they may be."""
    if not folders.classes or not known:
        return None
    if folders.named and max(folders.classes) >= known:
        wrong = f"{max(folders.classes)} is none of the net's classes 0 to {known - 1}"
    elif not folders.named and len(folders.classes) != known:
        wrong = f"the net has {known} classes"
    else:
        return None
    return (
        f"{wrong}, so the images are read as unlabeled; a list of `path label` lines can say which they are"
    )
