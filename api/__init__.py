"""The service: launch, watch and inspect runs over REST and in the browser.

main      create_app: settings -> FastAPI                    security  tokens, scopes, who may ask
schemas   every request and answer, with examples            limits    sizes, rates, origins, headers
problems  errors as RFC 9457 problem details                 launcher  runs start and stop through Prefect
runs, observe, trajectories, offline, queries, configs, health            reader, feed   runs read from storage

It reads storage and starts deployments by name; it imports neither flows nor torch. Killing it loses nothing.
"""
