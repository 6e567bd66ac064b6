"""EasyEdit's MEND, watched: two lines more than EasyEdit's own example, an import and a `with`.

    python examples/easyedit_mend.py hparams/MEND/gpt2-xl.yaml runs/mend
    stabilitylab check runs/mend

The first argument is EasyEdit's file of hyperparameters, which names the model and the trained hypernetwork. EasyEdit
has to be importable (https://github.com/zjunlp/EasyEdit).
"""

from __future__ import annotations

import sys

from easyeditor import BaseEditor, MENDHyperParams

from stabilitylab.integrations.easyedit import watch  # 1

PROMPTS = [
    "Which university did Watts Humphrey attend?",
    "Which family does Ramalinaceae belong to?",
    "What role does Denny Herzig play in football?",
    "Who was the designer of Lahti Town Hall?",
    "What is the original channel that It's a Business played on?",
    "What city did Marl Young live when he died?",
]
TARGETS = ["University of Michigan", "Lamiinae", "winger", "Alfred Lahti", "DuMont Television", "New Orleans"]

editor = BaseEditor.from_hparams(MENDHyperParams.from_hparams(sys.argv[1]))
with watch(editor, run=sys.argv[2]) as monitor:  # 2
    editor.edit(PROMPTS, TARGETS, ground_truth=["unknown"] * len(PROMPTS), sequential_edit=True)
print(monitor.diagnosis())
