-- relation: One row per trajectory, without the flat candidate lists (`candidates` has them one by one).
-- reads trajectory_rows, trained_indices
-- column run: Run id.
-- column shard: Name of its shard: first and last index, both inclusive.
-- column index: Trajectory index in the run.
-- column prompt_id: Stable id of the question; may repeat at other indices.
-- column prompt_group: The prompt's label, for example a noise level; may be empty.
-- column prompt_ids: [P] token ids of the prompt.
-- column num_tokens: T, response tokens, EOS included.
-- column response_ids: [T] token ids of the response.
-- column behaviour_logprobs: [T] log p_old of each response token, nats.
-- column version_first: Policy version that produced the first response token.
-- column version_last: Policy version that produced the last response token.
-- column version_run_versions: [R] policy version of each run of consecutive tokens.
-- column version_run_lengths: [R] tokens in each run; they add up to T.
-- column finish_reason: `stop` (EOS) or `length` (token limit).
-- column correct: The verifier's answer; null where the task has no verifier.
-- column head_k: Ids in the head per token; 0 for none.
-- column num_draws: Draws per token; 0 for none.
-- column draw_law: `policy` (p_old) or `tail` (p_old outside the head).
-- column step: Step that trained it; null while none has.
-- column staleness_max: Staleness of its oldest token, versions; null while untrained.
SELECT t.* EXCLUDE (head_ids, head_logprobs, tail_logmass, draw_ids, draw_logprobs), trained.step,
    trained.step - t.version_first AS staleness_max
FROM trajectory_rows AS t LEFT JOIN trained_indices AS trained USING (run, index)
