"""The example of the public TileRT package as it stands there, behind the line that sets its folder.

MODEL_WEIGHTS_DIR=/folder python examples/show_hands.py
"""

import os

MODEL_WEIGHTS_DIR = os.environ["MODEL_WEIGHTS_DIR"]

from tilert.models.deepseek_v3_2.dsa_show_hands import ShowHandsGenerator  # noqa: E402

generator: ShowHandsGenerator = ShowHandsGenerator(
    max_new_tokens=1000,
    model_weights_dir=MODEL_WEIGHTS_DIR,
    with_mtp=False,  # Disable MTP
)
generator.from_pretrained()

prompt = (
    "Tell me three jokes:\n\n"
    "1. A dad joke,\n"
    "2. A programmer joke,\n"
    "3. A joke that only makes sense if you've ever tried "
    "to train a large language model.\n"
    "Keep each joke under 15 words."
)

print("Prompt:", prompt)
print("Completion:")
completion = generator.generate(prompt)
