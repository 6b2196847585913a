-- relation: One row per trajectory and folder of scores that has it, without the flat lists.
-- reads score_rows
-- column run: Run id.
-- column shard: Name of its shard: first and last index, both inclusive.
-- column folder: Folder of the scores: the teacher's name, then after an @ what a back-fill asked for.
-- column origin: `run`: what the run itself asked its teacher, which `tokens` shows; or `backfill`.
-- column candidates_from: Which candidates were scored: `trajectories`, or the name of a back-filled set.
-- column index: Trajectory index in the run.
-- column teacher: The teacher's name.
-- column teacher_digest: Hash of everything that decides the numbers.
-- column temperature: Softmax temperature of every log-prob in the row.
-- column num_tokens: T, response tokens, EOS included.
-- column sampled_logprobs: [T] log q of each response token, nats.
-- column topk_k: Teacher top-k ids per token; 0 for none.
-- column head_k: Head ids per token of the trajectory that were scored; 0 for none.
-- column num_draws: Draws per token of the trajectory that were scored; 0 for none.
-- column num_teacher_draws: Ids per token drawn from the teacher; 0 for none.
SELECT * EXCLUDE (
    topk_ids, topk_logprobs, head_logprobs, draw_logprobs, teacher_draw_ids, teacher_draw_logprobs
)
FROM score_rows
