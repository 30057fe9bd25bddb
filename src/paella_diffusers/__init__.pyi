# The names of __init__.py, for type checkers and editors, which do not run it.

from .about import __version__ as __version__
from .models.prior_paella import PaellaPrior as PaellaPrior
from .models.unet_paella import PaellaUNet as PaellaUNet
from .models.vq_model import PaellaVQModel as PaellaVQModel, VQModel as VQModel
from .modular.modular_blocks_paella import PaellaAutoBlocks as PaellaAutoBlocks
from .modular.modular_pipeline_paella import PaellaModularPipeline as PaellaModularPipeline
from .pipelines.pipeline_paella import PaellaPipeline as PaellaPipeline
from .pipelines.pipeline_paella_img2img import PaellaImg2ImgPipeline as PaellaImg2ImgPipeline
from .pipelines.pipeline_paella_inpaint import PaellaInpaintPipeline as PaellaInpaintPipeline
from .pipelines.pipeline_paella_inversion import PaellaInversionPipeline as PaellaInversionPipeline
from .sampling.guidance.adaptive_projected_guidance import PaellaAdaptiveProjectedGuidance as PaellaAdaptiveProjectedGuidance
from .sampling.guidance.base import GuidanceMixin as GuidanceMixin
from .sampling.guidance.classifier_free_guidance import PaellaClassifierFreeGuidance as PaellaClassifierFreeGuidance
from .sampling.guidance.classifier_free_zero_star_guidance import (
    PaellaClassifierFreeZeroStarGuidance as PaellaClassifierFreeZeroStarGuidance,
)
from .sampling.guidance.perturbed_attention_guidance import (
    PaellaPerturbedAttentionGuidance as PaellaPerturbedAttentionGuidance,
)
from .sampling.guidance.rescaled_guidance import PaellaRescaledGuidance as PaellaRescaledGuidance
from .sampling.guidance.semantic_guidance import PaellaSemanticGuidance as PaellaSemanticGuidance
from .sampling.guidance.smoothed_energy_guidance import PaellaSmoothedEnergyGuidance as PaellaSmoothedEnergyGuidance
from .sampling.rewards import (
    ClassifierReward as ClassifierReward,
    ClipReward as ClipReward,
    LayoutReward as LayoutReward,
    RewardSum as RewardSum,
)
from .sampling.steering import (
    BestOfN as BestOfN,
    IterativeRefinement as IterativeRefinement,
    SequentialMonteCarlo as SequentialMonteCarlo,
)
from .schedulers.scheduling_ddim_wuerstchen import DDIMWuerstchenScheduler as DDIMWuerstchenScheduler
from .schedulers.scheduling_paella import PaellaScheduler as PaellaScheduler
from .schedulers.scheduling_paella_confidence import PaellaConfidenceScheduler as PaellaConfidenceScheduler
from .schedulers.scheduling_paella_flow_match_euler import PaellaFlowMatchEulerScheduler as PaellaFlowMatchEulerScheduler
from .schedulers.scheduling_paella_flow_match_trapezoidal import (
    PaellaFlowMatchTrapezoidalScheduler as PaellaFlowMatchTrapezoidalScheduler,
)
from .schedulers.scheduling_paella_psi import PaellaPsiScheduler as PaellaPsiScheduler

EMOJI_MODEL: str
__all__: list[str]
