"""Singular values of weights, and the matrices that stored weights stand for."""

from specdef.spectral.summary import SpectralSummary as SpectralSummary
from specdef.spectral.summary import condition_number as condition_number
from specdef.spectral.summary import sigma_max as sigma_max
from specdef.spectral.summary import spectral_summary as spectral_summary
from specdef.spectral.summary import stable_rank as stable_rank
from specdef.spectral.topk import TopKInfo as TopKInfo
from specdef.spectral.topk import TopKSVD as TopKSVD
from specdef.spectral.topk import topk_svd as topk_svd
from specdef.spectral.topk import topk_svd_info as topk_svd_info
from specdef.spectral.views import as_matrix as as_matrix
from specdef.spectral.views import diagonal_sigma_max as diagonal_sigma_max
from specdef.spectral.views import from_matrix as from_matrix
