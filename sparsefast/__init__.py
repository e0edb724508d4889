"""Modules:

- `sparsefast.allocation`: How a number of drops, or of new weights, is shared out among the layers of a model
- `sparsefast.callback`: Dynamic sparse training in a fastai `Learner`
- `sparsefast.checkpoint`: A training that is stopped, by you or by a power cut, goes on as if nothing had happened
- `sparsefast.cli`: `sparsefast_train`: a sparse model and its dense twin, from one line in a shell
- `sparsefast.distributions`: How the sparsity of a model is shared out among its layers
- `sparsefast.flops`: What a forward pass costs, dense and with masks, and what a whole training costs
- `sparsefast.masks`: Which weights of a layer are active: boolean masks kept beside the parameters they belong to
- `sparsefast.methods`: Dynamic sparse training, for any PyTorch loop: what a method is, when it acts, and what it does around the optimizer's step
- `sparsefast.patterns`: Which masks are allowed: any, N of each M, blocks, or as many in every row
- `sparsefast.presets`: Published methods, each a dict of functions and numbers
- `sparsefast.ranks`: Several processes, one set of masks
- `sparsefast.rewire`: One update of the masks: prune or revive, drop, grow, and make weights and optimizer state follow
- `sparsefast.saliency`: Which weights matter, seen before training: SNIP, GraSP and SynFlow
- `sparsefast.schedules`: How a number changes while a network trains: the share of weights replaced at an update, and sparsity itself
- `sparsefast.scores`: Which weights to drop and which to grow, and what grown ones start from
- `sparsefast.sparsify`: From a dense model to a sparse one, and back"""

__version__ = "0.1.0"
