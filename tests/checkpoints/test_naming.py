"""Every published naming gives the golden feature maps, and those of transformers."""
import pytest
import torch
from safetensors.torch import save_file

from convnext_mm.checkpoints import naming
from tests.helpers import FILES, GOLDEN_SIZE, assert_close, golden, load_golden, official


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('name', FILES)
def test_golden_features(name, suffix, tmp_path):
    content = golden(name)
    checkpoint, path = content['checkpoint'], tmp_path / f'file.{suffix}'
    if suffix == 'pth':
        torch.save(checkpoint, path)
    else:
        save_file(checkpoint.get('model') or checkpoint.get('state_dict') or checkpoint, path)
    with torch.no_grad():
        ours = load_golden(path, use_grn=name.startswith('v2'))(content['input'])
    assert_close(ours, content['features'])


def rename_golden(name: str, scheme: str) -> dict:
    """A golden classifier with another library's names."""
    prefix = naming.SCHEMES[scheme].prefix[name.startswith('v2')]
    renamed, lost = naming.from_official(official(name), scheme, prefix)
    assert lost in ([], ['norm.weight', 'norm.bias'])
    return renamed


def dense_to_sparse(state: dict) -> dict:
    """Convert weights to FCMAE's encoder of sparse convolutions, one kernel position at a time."""
    out = {'mask_token': torch.zeros(1, 8, 1, 1), 'proj.weight': torch.zeros(8, 8, 1, 1),
           'decoder.0.dwconv.weight': torch.zeros(8, 1, 7, 7), 'pred.bias': torch.zeros(2)}
    for name, value in state.items():
        if name.startswith(('norm.', 'head.')):
            continue
        parts = name.split('.')
        if parts[0] == 'downsample_layers' and parts[1] == '0':
            pass  # the stem is dense there as well
        elif value.ndim == 4 and not name.endswith(('gamma', 'beta')):
            rows, columns = value.shape[2:]
            positions = [value[:, :, y, x] for x in range(columns) for y in range(rows)]
            depthwise = parts[3:4] == ['dwconv']
            value = torch.stack([p[:, 0] if depthwise else p.T for p in positions])
            parts[-1] = 'kernel'
        elif (name.endswith(('gamma', 'beta')) or parts[-2] == 'dwconv'
              or (parts[0] == 'downsample_layers' and parts[2] == '1')):
            value = value.reshape(1, -1)
        else:
            parts.insert(-1, 'linear' if 'pwconv' in parts[-2] else 'ln')
        out['encoder.' + '.'.join(parts)] = value
    return out


@pytest.mark.parametrize(('name', 'scheme'), [
    (name, key) for name in ('v1_official_classification', 'v2_official_classification')
    for key, scheme in naming.SCHEMES.items() if name.startswith('v1') or scheme.grn])
@pytest.mark.parametrize('wrap', [
    lambda s: s, lambda s: {f'module.{k}': v for k, v in s.items()},
    lambda s: dict(state_dict={f'model.{k}': v for k, v in s.items()}, epoch=3)],
    ids=['plain', 'DistributedDataParallel', 'Lightning'])
def test_features_are_the_same_with_every_naming(name, scheme, wrap, tmp_path):
    torch.save(wrap(rename_golden(name, scheme)), tmp_path / 'file.pth')
    content = golden(name)
    with torch.no_grad():
        ours = load_golden(tmp_path / 'file.pth', use_grn=name.startswith('v2'))(content['input'])
    assert_close(ours, content['features'])


def test_fcmae_with_sparse_convolutions(tmp_path):
    content = golden('v2_official_classification')
    state = dense_to_sparse(content['checkpoint']['model'])
    torch.save(dict(model=state), tmp_path / 'fcmae.pt')
    with torch.no_grad():
        ours = load_golden(tmp_path / 'fcmae.pt', use_grn=True)(content['input'])
    assert_close(ours, content['features'])


def test_timm_with_1x1_convolutions(tmp_path):
    state = {name: value[..., None, None] if '.mlp.fc' in name and value.ndim == 2 else value
             for name, value in rename_golden('v1_official_classification', 'timm').items()}
    torch.save(state, tmp_path / 'timm.pth')
    with torch.no_grad():
        ours = load_golden(tmp_path / 'timm.pth')(golden('v1_official_classification')['input'])
    assert_close(ours, golden('v1_official_classification')['features'])


def transformers_backbone(version: int):
    """A transformers backbone of the golden size with random weights, and an input."""
    import transformers
    kinds = {1: (transformers.ConvNextConfig, transformers.ConvNextBackbone),
             2: (transformers.ConvNextV2Config, transformers.ConvNextV2Backbone)}
    config, backbone = kinds[version]
    torch.manual_seed(version)
    theirs = backbone(config(depths=GOLDEN_SIZE['depths'], hidden_sizes=GOLDEN_SIZE['dims'],
                             out_features=['stage1', 'stage2', 'stage3', 'stage4'])).eval()
    for parameter in theirs.parameters():  # norms, layer scales and GRNs that have an effect
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs, torch.randn(2, 3, 64, 96)


@pytest.mark.parametrize('version', [1, 2])
def test_parity_with_transformers(version, tmp_path):
    """Its backbones give the same shapes, values and gradients."""
    theirs, image = transformers_backbone(version)
    save_file(theirs.state_dict(), tmp_path / 'model.safetensors')
    ours = load_golden(tmp_path / 'model.safetensors', use_grn=version == 2)
    outs = []
    for model in (ours, theirs):
        x = image.clone().requires_grad_()
        maps = model(x) if model is ours else model(x).feature_maps
        sum((i + 1) * m.square().mean() for i, m in enumerate(maps)).backward()
        outs.append((maps, x.grad))
    for a, b in zip(outs[0][0], outs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs[0][1], outs[1][1], rtol=1e-4, atol=1e-6)
    gradients, *_ = naming.to_official(
        {name: p.grad for name, p in theirs.named_parameters()},
        naming.DetectedConvNeXt('transformers', ''))
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_dinov3_of_transformers(tmp_path):
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel
    torch.manual_seed(0)
    theirs = DINOv3ConvNextModel(DINOv3ConvNextConfig(
        depths=GOLDEN_SIZE['depths'], hidden_sizes=GOLDEN_SIZE['dims'],
        layer_scale_init_value=0.5)).eval()
    save_file(theirs.state_dict(), tmp_path / 'model.safetensors')
    ours = load_golden(tmp_path / 'model.safetensors', out_indices=[3])
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        # Its only norm is applied to the pooled map and to each position of the last map.
        torch.nn.Module.load_state_dict(ours.norm3, theirs.layer_norm.state_dict())
        expected = theirs(image).last_hidden_state[:, 1:]
        assert_close([ours(image)[0].flatten(2).transpose(1, 2)], [expected])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU with timm installed')
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
def test_parity_with_timm_on_a_gpu(name, tmp_path):
    timm = pytest.importorskip('timm', reason='needs timm')
    size = dict(depths=GOLDEN_SIZE['depths'], dims=GOLDEN_SIZE['dims'])
    theirs = timm.create_model(name, features_only=True, conv_mlp=False, **size).cuda().eval()
    torch.save({k: v.cpu() for k, v in theirs.state_dict().items()}, tmp_path / 'timm.pth')
    ours = load_golden(tmp_path / 'timm.pth', use_grn='v2' in name).cuda()
    for i in range(4):
        setattr(ours, f'norm{i}', torch.nn.Identity())
    image = torch.randn(2, 3, 64, 96, device='cuda')
    with torch.no_grad():
        assert_close(ours(image), theirs(image), 1e-3)
