# A faster step: _base_ = ['./RECIPE.py', './_base_/fast.py'], or a key of it on the command line.
fast = dict(
    channels_last=True,  # convolutions of neck and heads as well; the backbone's are anyway
    fused_optimizer=True,  # one kernel for all of AdamW
    bf16=True,  # without a loss scaler; needs a GPU since Ampere
    compile=[],  # e.g. ['backbone', 'decode_head', 'auxiliary_head']
    dynamic=False,  # compile for pictures of any size
    cuda_graphs=False)  # replay what is compiled; pictures of one size
