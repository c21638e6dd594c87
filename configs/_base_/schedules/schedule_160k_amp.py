_base_ = './schedule_160k.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
