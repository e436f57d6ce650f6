"""The trajectory server: the durable queue between environments (who produce groups) and the learner (who leases them).

`queue` decides, `store` remembers, `app` listens; `client` is the other end of the wire, `wire` the wire itself.
"""
