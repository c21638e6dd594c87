_base_ = './schedule_3x.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
