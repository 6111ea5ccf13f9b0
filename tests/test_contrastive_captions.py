from __future__ import annotations

import numpy as np

from anomaly_clip.backbones.prompts import PromptEnsemble
from anomaly_clip.demo.photographs import DEFECTS
from anomaly_clip.methods.contrastive_captions import Captions, ImageLabels


def test_captions_claim_only_what_is_true() -> None:
    prompts = PromptEnsemble()
    captions = Captions(prompts, ["cat", "river", "blue"])
    rng = np.random.default_rng(0)
    normal = ImageLabels("oak wood board", None, "dark")
    scratched = ImageLabels("oak wood board", "scratch", None)
    for _ in range(200):
        of_normal, of_scratched = captions.draw(normal, rng), captions.draw(scratched, rng)
        assert of_normal.fits(normal)
        assert of_scratched.fits(scratched)
        assert not of_normal.fits(scratched)
        assert not of_scratched.fits(normal)
        assert ("oak wood board" in of_normal.text) == (of_normal.category is not None)
        assert ("scratch" in of_scratched.text) == (of_scratched.defect is not None)
        assert ("dark photo" in of_normal.text) == (of_normal.tone is not None)
        assert not any(tone in of_scratched.text for tone in ("dark", "bright", "blurry"))
    drawn = [captions.draw(scratched, rng) for _ in range(400)]
    assert 0.4 < np.mean([caption.category is not None for caption in drawn]) < 0.6
    assert 0.2 < np.mean([any(w in c.text for w in captions.vocabulary) for c in drawn]) < 0.4


def test_a_caption_fits_other_images_by_state_noun_and_defect() -> None:
    captions = Captions(PromptEnsemble(), ["cat"])
    rng = np.random.default_rng(3)
    drawn = [captions.draw(ImageLabels("oak wood board", "crack", None), rng) for _ in range(200)]
    with_defect = next(c for c in drawn if c.defect and c.category is None)
    assert with_defect.fits(ImageLabels("steel nut", "crack", "dark"))
    assert not with_defect.fits(ImageLabels("steel nut", "scratch", None))
    with_category = next(c for c in drawn if c.category and c.defect is None)
    assert with_category.fits(ImageLabels("oak wood board", "stain", None))
    assert not with_category.fits(ImageLabels("steel nut", "crack", None))


def test_general_states_name_no_defect() -> None:
    general = Captions(PromptEnsemble(), ["cat"]).general
    assert len(general) == 7
    assert not any(defect in state for state in general for defect in DEFECTS)
