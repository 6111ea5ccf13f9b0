from __future__ import annotations

import numpy as np

from anomaly_clip.backbones.prompts import PromptEnsemble
from anomaly_clip.demo.photographs import DEFECTS
from anomaly_clip.methods.contrastive_captions import Captions, ImageLabels


def test_sentences_claim_only_what_is_true() -> None:
    prompts = PromptEnsemble()
    captions = Captions(prompts, ["cat", "river", "blue"])
    rng = np.random.default_rng(0)
    normal = ImageLabels("oak wood board", None, "dark")
    scratched = ImageLabels("oak wood board", "scratch", None)
    for _ in range(200):
        one, other = captions.draw(normal, rng), captions.draw(scratched, rng)
        assert one.fits(normal)
        assert other.fits(scratched)
        assert not one.fits(scratched)
        assert not other.fits(normal)
        assert ("oak wood board" in one.sentence) == (one.category is not None)
        assert ("scratch" in other.sentence) == (other.defect is not None)
        assert ("dark photo" in one.sentence) == (one.tone is not None)
        assert not any(tone in other.sentence for tone in ("dark", "bright", "blurry"))
    drawn = [captions.draw(scratched, rng) for _ in range(400)]
    assert 0.4 < np.mean([caption.category is not None for caption in drawn]) < 0.6
    assert 0.2 < np.mean([any(w in c.sentence for w in captions.vocabulary) for c in drawn]) < 0.4


def test_a_sentence_fits_other_pictures_by_state_noun_and_kind() -> None:
    captions = Captions(PromptEnsemble(), ["cat"])
    rng = np.random.default_rng(3)
    drawn = [captions.draw(ImageLabels("oak wood board", "crack", None), rng) for _ in range(200)]
    kind = next(c for c in drawn if c.defect and c.category is None)
    assert kind.fits(ImageLabels("steel nut", "crack", "dark"))
    assert not kind.fits(ImageLabels("steel nut", "scratch", None))
    noun = next(c for c in drawn if c.category and c.defect is None)
    assert noun.fits(ImageLabels("oak wood board", "stain", None))
    assert not noun.fits(ImageLabels("steel nut", "crack", None))


def test_every_general_state_names_no_kind() -> None:
    general = Captions(PromptEnsemble(), ["cat"]).general
    assert len(general) == 7
    assert not any(defect in state for state in general for defect in DEFECTS)
