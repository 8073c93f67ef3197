"""Everything that imports megatron.core. The compat layer goes in before the first such import."""

import warnings

from megatron_mapo.patches import megatron_core

# megatron-core warns on import that Transformer Engine and Apex are absent; the layer spec here needs neither.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
# Notices of torch and megatron-core about each other's interfaces; nothing a user could change.
for notice in (
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
    "full scope is deprecated",
    "The .grad attribute of a Tensor",
    "`torch.distributed.*is deprecated",
):
    warnings.filterwarnings("ignore", message=notice)
megatron_core.apply()
