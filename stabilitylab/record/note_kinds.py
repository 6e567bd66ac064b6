"""The kinds of notes that mean something to the analyzer. All others are for the reader alone."""

from __future__ import annotations

from typing import Final

NOTHING_MOVED: Final = "nothing-moved"
"""An edit moved no parameter at all, of a loop that was attached to without sites."""
MOVED_BESIDES: Final = "moved-besides"
"""Edits move parameters beside those that a host names."""
BROUGHT: Final = "brought"
"""An edit added parameters to the model, such as those of an adapter."""
NOT_PUT_BACK: Final = "not-put-back"
"""What a host does to put an edit back has run, and the edited weights stayed."""
SINGLE_EDITS: Final = "single-edits"
"""The host was called such that each edit is meant for the original model."""
SEQUENTIAL_EDITS: Final = "sequential-edits"
"""The host was called such that each edit is meant to build on the one before."""
OTHER_MODEL: Final = "other-model"
"""The host's editor works on another model than the one that is watched."""
HOOKS_SILENT: Final = "hooks-silent"
"""Hooks were on layers of the model, and none has ever fired, though edits moved weights."""
NEVER_RUN: Final = "never-run"
"""The same, and no weight moved: the edits are made on another model."""
EDITOR_STATE: Final = "editor-state"
"""What an editor holds would break an edit: warned of before it is saved."""
EDITOR_REBUILT: Final = "editor-rebuilt"
"""The host has built its editor anew between edits."""
REPLAY: Final = "replay"
"""What is to be said of an edit that was made once more, besides the operation that was found."""
UNWATCHED: Final = frozenset({"canary-off", "skipped-site", HOOKS_SILENT, OTHER_MODEL})
"""Something that was asked for could not be watched."""
