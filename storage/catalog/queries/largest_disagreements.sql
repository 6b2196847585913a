-- question: Which tokens did the student choose that the teacher finds least likely, compared with the student?
-- parameter num INTEGER = 20: rows
-- parameter before INTEGER = 12: tokens of context shown before the token
-- column run: run id
-- column index: trajectory
-- column position: position in the response, from 0
-- column version: policy version that sampled it
-- column prompt: text of the prompt
-- column context: text of the tokens before
-- column token: text of the token
-- column student_logprob: log p_old, nats
-- column teacher_logprob: log q, nats
-- column kl_nats: their difference, nats
WITH worst AS (
    SELECT run, index, position, version, behaviour_logprob, teacher_logprob, kl_nats
    FROM tokens WHERE kl_nats IS NOT NULL ORDER BY kl_nats DESC, run, index, position LIMIT $num
)
SELECT run, index, position, version, text_of(run, prompt_ids) AS prompt,
    text_of(run, response_ids[greatest(position - $before, 0) + 1 : position]) AS context,
    text_of(run, response_ids[position + 1 : position + 1]) AS token,
    behaviour_logprob AS student_logprob, teacher_logprob, kl_nats
FROM worst JOIN trajectories USING (run, index)
ORDER BY kl_nats DESC, run, index, position
