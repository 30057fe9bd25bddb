from ..registration import register

register()
