"""Train and evaluate segmentation, then detection, on generated images."""
from convnext_mm_command import put_off_registration

if __name__ == '__main__':
    put_off_registration()
    from convnext_mm.demo import main
    main()
