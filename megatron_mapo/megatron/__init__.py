"""Everything that imports megatron.core. The compat layer goes in before the first such import."""

import warnings

from megatron_mapo.patches import megatron_core

# megatron-core warns on import that Transformer Engine and Apex are absent; the layer spec here needs neither.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
megatron_core.apply()
