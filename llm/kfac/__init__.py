"""K-FAC: precondition the gradients of linear layers by their curvature, before the step of any optimizer.

The package needs torch and torch.distributed only; it imports nothing else of `llm`.

    kfac = KFACPreconditioner(model, factor_update_steps=1)
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()  # a mean over the tokens
        kfac.step()  # or kfac.discard() if the gradients are not finite
        optimizer.step()

Sources: Martens & Grosse 2015 (arXiv:1503.05671); Eschenhagen et al. 2023 (arXiv:2311.00636), whose "expand" setting
counts every token as an example; Pauloski et al. 2021 (arXiv:2107.01739), for the distribution of work over the ranks.
"""

from llm.kfac.preconditioner import KFACPreconditioner
from llm.kfac.schedule import dense_early
from llm.kfac.summary import Report

__all__ = ["KFACPreconditioner", "Report", "dense_early"]
