"""What a node tells the host's progress bar. Newer hosts throttle what the bar passes on, so
tests listen in front of it.

The host's own hook is not called here, so whatever stops on Cancel has polled for it itself.
"""

import comfy.model_management
import comfy.utils

_update = comfy.utils.ProgressBar.update_absolute


def on_report(function) -> None:
    """Call `function(done, total, preview)` at every report from now on."""

    def update(bar, value, total=None, preview=None):
        _update(bar, value, total, preview)
        function(bar.current, bar.total, preview)

    comfy.utils.ProgressBar.update_absolute = update


def cancel_at(step: int) -> None:
    """Cancel, as the user's button does, while this step is reported."""
    on_report(lambda done, *_: comfy.model_management.interrupt_current_processing(done == step))


def stop_listening() -> None:
    comfy.utils.ProgressBar.update_absolute = _update
    comfy.model_management.interrupt_current_processing(False)
