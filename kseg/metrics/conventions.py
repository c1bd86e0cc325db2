"""Every number that goes by the name of mean IoU, each under a name of its own."""

from __future__ import annotations

import numpy as np

from kseg.metrics.iou import class_ious, pixel_accuracies, present_mean


def conventions(tallies: np.ndarray, *, background: int | None = None) -> dict[str, float | None]:
    """Return the mean IoU by every convention in use, all of the same pixels.

    "Of the set": pixels of all images are counted together first, then divided. "Of an image":
    each image is divided by itself, then averaged; small images and small objects weigh more.
    A class is present where it has a true or a predicted pixel, true where it has a true one.

        miou
            of the set, mean over its present classes; kseg's own
        miou_true_classes
            of the set, mean over its true classes: a class that is only
            predicted costs nothing itself
        miou_absent_as_zero
            of the set, mean over all classes, absent ones count 0
        miou_absent_as_one
            of the set, mean over all classes, absent ones count 1
        miou_without_background
            as `miou`, the background left out of the mean; its pixels still
            count against other classes; None if there is none
        worst_class_iou
            of the set, the least IoU of a present class
        miou_of_images
            of an image, mean over its present classes; mean over images
        miou_of_images_true_classes
            of an image, mean over its true classes; mean over images: an
            object that is seen where there is none costs nothing itself
        miou_of_class_means
            IoU of each class in each image where it is present, mean over
            these images; mean over classes
        pixel_accuracy
            right pixels of all images, of all valid pixels
        pixel_accuracy_of_images
            the same of an image; mean over images

    An image without a valid pixel is left out of means over images.

    Args:
        tallies: right, true and predicted pixels of each class in each image, (N, 3, C).
        background: id of the class left out of `miou_without_background`.

    Returns:
        Fractions 0..1; NaN where nothing is left to average.

    Source:
        M. Everingham et al., "The Pascal Visual Object Classes Challenge: A Retrospective", IJCV
        2015 (of the set); Z. Wang et al., "Revisiting Evaluation Metrics for Semantic
        Segmentation", NeurIPS 2023, arXiv:2310.19252 (of images and of class means).

    Example:
        One image has a pixel of class 0, labelled 0; another has two of class 1, labelled 0 and 1.
        IoUs of the set are 1/2 and 1/2. The first image has IoU 1; the second 0 (class 0 is only
        predicted) and 1/2, mean 1/4.

        >>> found = conventions(np.array([[[1, 0], [1, 0], [1, 0]], [[0, 1], [0, 2], [1, 1]]]))
        >>> found["miou"], found["miou_of_images"], found["miou_of_images_true_classes"]
        (0.5, 0.625, 0.75)
    """
    of_set, of_images = class_ious(tallies.sum(axis=0)), class_ious(tallies)
    true_of_images = np.where(tallies[:, 1] > 0, of_images, np.nan)
    means = {
        "miou": present_mean(of_set),
        "miou_true_classes": present_mean(np.where(tallies[:, 1].sum(axis=0) > 0, of_set, np.nan)),
        "miou_absent_as_zero": np.nan_to_num(of_set, nan=0.0).mean(),
        "miou_absent_as_one": np.nan_to_num(of_set, nan=1.0).mean(),
        "miou_without_background": _without(of_set, background),
        "worst_class_iou": np.fmin.reduce(of_set),
        "miou_of_images": present_mean(present_mean(of_images)),
        "miou_of_images_true_classes": present_mean(present_mean(true_of_images)),
        "miou_of_class_means": present_mean(present_mean(of_images.T)),
        "pixel_accuracy": pixel_accuracies(tallies.sum(axis=0)),
        "pixel_accuracy_of_images": present_mean(pixel_accuracies(tallies)),
    }
    return {name: None if mean is None else float(mean) for name, mean in means.items()}


def _without(ious: np.ndarray, background: int | None) -> np.ndarray | None:
    return None if background is None else present_mean(np.delete(ious, background))
