"""
Models from pretrained parts; experts grown, added, dropped, merged and exported; where tokens are routed.
Imports `hub` alone.
"""
